"""How the buffer scales, beside two other replay buffers."""
