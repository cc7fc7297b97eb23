"""`minidistill doctor`: whether this machine and what is installed on it can run minidistill."""
