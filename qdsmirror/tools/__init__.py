"""The command-line tools: one module per family of commands, no Twisted import at start-up."""
