"""What the verbs of the `iret` command do: parse nothing, call one function, print."""
