with

orders as (

    select * from {{ ref('orders_by_day') }}

),

daily as (

    select
        order_date,
        sum(total_orders) as total_orders,
        sum(fraud_orders) as fraud_orders,
        {% for reason in var('reasons') -%}
        sum({{ reason }}) as {{ reason }}{{ ',' if not loop.last }}
        {% endfor %}
    from orders
    group by order_date

),

with_last_seven_days as (

    select
        *,
        sum(fraud_orders) over (
            order by unix_date(order_date) range between 6 preceding and current row
        ) as fraud_orders_7d,
        -- Days without orders have no row, but count; days before the first order do not.
        least(7, date_diff(order_date, min(order_date) over (), day) + 1) as days
    from daily

),

final as (

    select
        order_date,
        total_orders,
        fraud_orders,
        cast(fraud_orders as float64) / total_orders as fraud_rate,
        cast(fraud_orders_7d as float64) / days as fraud_orders_7d_avg,
        {{ var('reasons') | join(',\n        ') }}
    from with_last_seven_days

)

select * from final
