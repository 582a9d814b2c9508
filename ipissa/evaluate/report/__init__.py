"""What `ipissa eval` leaves: tables, figures, every row, and one page with all of it."""
