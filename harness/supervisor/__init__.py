"""The processes that runs live in: started, monitored by their heartbeats, ended, and the row of one that wrote none."""
