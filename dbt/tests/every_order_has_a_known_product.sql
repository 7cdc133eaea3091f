{{ config(severity='warn') }}

select orders.order_id
from {{ ref('fct_orders') }} as orders
left join {{ ref('dim_products') }} as products on orders.product_id = products.product_id
where products.product_id is null
