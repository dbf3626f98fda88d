"""The operations of the public API, one file each. Only this package imports both passes and runtimes."""
