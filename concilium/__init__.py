"""The front door: the `concilium` command, and a whole federation in one box (`concilium demo`)."""
