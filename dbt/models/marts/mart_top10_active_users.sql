with

all_orders as (

    select * from {{ ref('orders_by_user') }}
    where created_day is null

),

users as (

    select * from {{ ref('dim_users') }}

),

by_user as (

    select
        user_id,
        total_orders - fraud_orders as orders,
        genuine_amount as amount
    from all_orders
    where total_orders > fraud_orders

),

top_10 as (

    select
        row_number() over (order by orders desc, user_id) as user_rank,
        *
    from by_user
    qualify user_rank <= 10

),

final as (

    select
        top_10.user_rank,
        top_10.user_id,
        users.name,
        top_10.orders,
        top_10.amount
    from top_10
    left join users on top_10.user_id = users.user_id

)

select * from final
