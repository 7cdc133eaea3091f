{{
    config(
        materialized='incremental',
        partition_by={'field': 'created_day', 'data_type': 'date', 'granularity': 'day'},
        cluster_by=['product_id'],
    )
}}

with

orders as (

    select * from {{ ref('fct_orders') }}
    where {{ is_of_a_changed_day('created_date') }}

),

costs as (

    select * from {{ ref('product_costs') }}

),

by_day as (

    select
        date(orders.created_date) as created_day,
        orders.product_id,
        -- A product that is not known yet will have had its first cost from the beginning.
        coalesce(costs.known_from, timestamp '0001-01-01') as cost_from,
        count(*) as total_orders,
        countif(orders.is_fraud) as fraud_orders,
        sum(if(orders.is_fraud, {{ wide('orders.amount_numeric') }}, 0)) as fraud_amount,
        sum(if(orders.is_fraud, 0, {{ wide('orders.quantity') }})) as units_sold,
        sum(if(orders.is_fraud, 0, {{ wide('orders.amount_numeric') }})) as revenue
    from orders
    left join costs
        on
            orders.product_id = costs.product_id
            and orders.created_date >= costs.known_from
            and (orders.created_date < costs.known_to or costs.known_to is null)
    group by created_day, orders.product_id, cost_from

),

{{
    and_of_all_days(
        'by_day',
        keys=['product_id', 'cost_from'],
        counts=['total_orders', 'fraud_orders'],
        sums=['fraud_amount', 'units_sold', 'revenue'],
    )
}}

select * from final
