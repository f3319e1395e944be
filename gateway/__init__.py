"""The application: composition, command line, HTTP front. Sees all packages."""
