"""The room for RBMs on top of vision-language features; nothing is in it in this release."""
