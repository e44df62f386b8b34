"""What programs on top of mflux import at mflux 0.24's paths, as thin views of what is here (`import_paths.MOVED`)."""
