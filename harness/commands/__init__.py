"""Commands of one file each. A command with parts of its own is a package beside this one."""
