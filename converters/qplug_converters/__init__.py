"""What a quantized checkpoint means, and how one becomes another."""
