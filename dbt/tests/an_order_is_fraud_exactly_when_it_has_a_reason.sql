select order_id
from {{ ref('fct_orders') }}
where is_fraud != (array_length(reasons) > 0)
