def record(*a): print(a)
def write_docs(): pass
