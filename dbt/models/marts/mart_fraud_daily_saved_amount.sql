with

orders as (

    select * from {{ ref('orders_by_day') }}

),

daily as (

    select
        order_date,
        sum(fraud_orders) as fraud_orders,
        sum(saved_amount) as saved_amount
    from orders
    group by order_date

),

final as (

    select
        order_date,
        fraud_orders,
        saved_amount,
        sum(saved_amount) over (order by order_date) as cumulative_saved_amount
    from daily

)

select * from final
