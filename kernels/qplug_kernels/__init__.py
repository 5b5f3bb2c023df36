"""How a quantized linear is multiplied: kernels that know no file and no engine."""
