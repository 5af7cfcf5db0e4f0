"""S²FT inside other programs that train or score models: one module for each program.

A module here imports the program it is named after, so none of them is imported by s2ft itself.
"""
