"""From the files of a results folder to tables, verdicts and a dossier. Imports no torch."""
