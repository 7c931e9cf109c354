"""A group's life on one side (driver, primary, remote), over storage and net, without processes."""
