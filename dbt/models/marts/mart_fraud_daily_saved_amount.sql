with

orders as (

    select * from {{ ref('fct_orders') }}

),

daily as (

    select
        order_date,
        countif(is_fraud) as fraud_orders,
        sum(if(is_fraud, amount_numeric, 0)) as saved_amount
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
