"""What people start: offline inference, the command line, the demo."""
