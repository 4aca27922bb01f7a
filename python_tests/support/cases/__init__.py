"""Of each op: cases, bad calls and their messages, bytes kept. A file for each stem."""
