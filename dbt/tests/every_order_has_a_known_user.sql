{{ config(severity='warn') }}

select orders.order_id
from {{ ref('fct_orders') }} as orders
left join {{ ref('dim_users') }} as users on orders.user_id = users.user_id
where users.user_id is null
