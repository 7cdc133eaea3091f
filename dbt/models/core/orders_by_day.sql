{{
    config(
        materialized='incremental',
        partition_by={'field': 'created_day', 'data_type': 'date', 'granularity': 'month'},
    )
}}

with

orders as (

    select * from {{ ref('fct_orders') }}
    where {{ is_of_a_changed_day('created_date') }}

),

final as (

    select
        date(created_date) as created_day,
        order_date,
        count(*) as total_orders,
        countif(is_fraud) as fraud_orders,
        sum(if(is_fraud, {{ wide('amount_numeric') }}, 0)) as saved_amount,
        sum(if(is_fraud, 0, {{ wide('quantity') }})) as units_sold,
        sum(if(is_fraud, 0, {{ wide('amount_numeric') }})) as revenue,
        {% for reason in var('reasons') -%}
        countif('{{ reason }}' in unnest(reasons)) as {{ reason }}{{ ',' if not loop.last }}
        {% endfor %}
    from orders
    group by created_day, order_date

)

select * from final
