"""PEFT's method comparison on MetaMathQA and GSM8K, for S²FT and other methods, on one GPU or on a CPU."""
