"""Virtual cohorts as installable data; `README.md` is their data card."""
