"""The formats of adapter folders, one module each. Their rows are in :mod:`s2ft.files.formats`."""
