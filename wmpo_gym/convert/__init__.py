"""Conversion of the released WMPO files to worlds and policies of this package.

Files are read without executing code from them, checked name by name and shape by shape, and written as JSON
and safetensors.
"""
