"""`python -m mflux`: the same as `mflux`, where the command is not on the PATH."""

import sys

from mflux.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
