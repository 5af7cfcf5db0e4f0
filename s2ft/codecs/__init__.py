"""Codecs: how formats of quantized files pack weights, so that a few of them can be changed in the file.

Codes change, and scales that belong to the changed weights alone. What others share stays, see
:class:`s2ft.codecs.codec.Codec`. A new format is a row or a file of this folder.
"""
