"""Convert models between forms, quantize and calibrate them."""
