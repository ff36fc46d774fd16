"""What use costs, and the ledger of it.

sheet      price sheets: vendors' published prices and the operator's own, read from TOML
price      usage and a sheet give a charge: the one place that computes money
row        what the ledger keeps
act        what is asked of the ledger for a turn or a cache object
budget     soft and hard stops by day, month or altogether
books      holds, charges, vouchers and budgets as pure bookkeeping
book_rows  the books in the database's tables
ledger     acts and credit in the database, in groups of calls
meter      storage of cache objects by time
report     what was used, by day, key, project, model, dialect or sheet; report_text, invoice: the same as JSON, CSV, a page
verify     the whole ledger read and counted anew (recount: the pure part)
"""
