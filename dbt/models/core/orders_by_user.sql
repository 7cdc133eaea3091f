{{
    config(
        materialized='incremental',
        partition_by={'field': 'created_day', 'data_type': 'date', 'granularity': 'day'},
        cluster_by=['user_id'],
    )
}}

with

orders as (

    select * from {{ ref('fct_orders') }}
    where {{ is_of_a_changed_day('created_date') }}

),

by_day as (

    select
        date(created_date) as created_day,
        user_id,
        count(*) as total_orders,
        countif(is_fraud) as fraud_orders,
        sum(if(is_fraud, {{ wide('amount_numeric') }}, 0)) as fraud_amount,
        sum(if(is_fraud, 0, {{ wide('amount_numeric') }})) as genuine_amount
    from orders
    group by created_day, user_id

),

{{
    and_of_all_days(
        'by_day',
        keys=['user_id'],
        counts=['total_orders', 'fraud_orders'],
        sums=['fraud_amount', 'genuine_amount'],
    )
}}

select * from final
