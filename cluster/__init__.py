"""Configuration, the Serve application, the command line, the HTTP interface and deployment."""
