"""The released WMPO files as worlds and policies of this package.

Everything is read without running code of theirs, compared name by name and shape by shape with what is
expected, and written as JSON and safetensors.
"""
