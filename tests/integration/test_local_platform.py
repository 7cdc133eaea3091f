def test_x(settings):
    print(settings)
def test_y(settings):
    print(settings)
