"""The commands, by what they are for. Each is the library call of the same name, with a table or JSON around it."""
