"""Other packages' functions, by their names and with their meaning, on the kernels of this one."""
