"""Scripts for developers of minidistill. They are not part of the package."""
