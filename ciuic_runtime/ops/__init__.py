"""The operators of DeepSeek models: for each its plain torch reference, and native kernels where they are built."""
