"""The operations: one file each, with schema, fake kernel, autograd and public function."""
