"""What people see: live displays, tables and summaries. Nothing here measures or decides."""
