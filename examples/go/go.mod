module assistant

go 1.19
