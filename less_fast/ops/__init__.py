"""The operations, one file each: the public op, its pure-torch reference, its cost. Only this room knows backends."""
