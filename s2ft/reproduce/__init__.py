"""The experiments of the S²FT paper, and comparisons with other methods under the same conditions."""
