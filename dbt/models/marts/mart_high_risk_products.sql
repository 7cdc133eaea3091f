with

orders as (

    select * from {{ ref('orders_by_product') }}
    where created_day is null

),

products as (

    select * from {{ ref('dim_products') }}

),

by_product as (

    select
        product_id,
        sum(total_orders) as total_orders,
        sum(fraud_orders) as fraud_orders,
        sum(fraud_amount) as fraud_amount
    from orders
    group by product_id

),

at_risk as (

    select
        *,
        cast(fraud_orders as float64) / total_orders as fraud_rate,
        {{ wilson_lower_bound('cast(fraud_orders as float64)', 'total_orders') }} as fraud_rate_at_least
    from by_product
    where fraud_orders > 0

),

final as (

    select
        row_number() over (order by at_risk.fraud_rate_at_least desc, at_risk.product_id) as risk_rank,
        at_risk.product_id,
        products.product_name,
        products.category,
        at_risk.total_orders,
        at_risk.fraud_orders,
        at_risk.fraud_rate,
        at_risk.fraud_rate_at_least,
        at_risk.fraud_amount
    from at_risk
    left join products on at_risk.product_id = products.product_id

)

select * from final
