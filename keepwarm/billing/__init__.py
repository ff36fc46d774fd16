"""What use costs, and the ledger of it.

sheet      price sheets: vendors' published prices and the operator's own, read from TOML
price      usage and a sheet give a charge: the one place that computes money
row        what the ledger keeps
books      holds, charges, vouchers and budgets as pure bookkeeping
ledger     the books in the database, in groups of calls
meter      storage of cache objects by time
report     what was used, by day, key, model, dialect and class
"""
