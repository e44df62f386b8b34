from mflux.models.fibo.variants.edit.fibo_edit import FIBOEdit

__all__ = ["FIBOEdit"]
