with

orders as (

    select * from {{ ref('fct_orders') }}

),

daily as (

    select
        order_date,
        count(*) as total_orders,
        countif(is_fraud) as fraud_orders,
        {% for reason in var('reasons') -%}
        countif('{{ reason }}' in unnest(reasons)) as {{ reason }}{{ ',' if not loop.last }}
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
        fraud_orders / total_orders as fraud_rate,
        fraud_orders_7d / days as fraud_orders_7d_avg,
        {{ var('reasons') | join(',\n        ') }}
    from with_last_seven_days

)

select * from final
