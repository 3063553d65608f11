"""Pure decisions: settings, schedule, seeds, ranks. Imports the standard library only."""
