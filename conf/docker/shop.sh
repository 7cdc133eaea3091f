#!/bin/sh
# The demonstration's shop: users and products, a month of orders that lie behind, then orders until it is stopped.
set -eu
mark=$FINPRO_HOME/shop-has-history

finpro generate
if [ ! -e "$mark" ]; then
    finpro produce --orders 20000 --rate 0 --event-rate 0.008
    touch "$mark"
fi
exec finpro produce --orders 0 --rate "$FINPRO_SHOP_RATE"
